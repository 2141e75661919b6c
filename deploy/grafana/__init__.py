"""The Grafana dashboard, written in Python; `make dashboards` turns it into the JSON that Grafana provisions."""
