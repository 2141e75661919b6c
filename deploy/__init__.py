"""What surrounds a running nbdzram: units, containers, Prometheus, Grafana. README.md says how to use each."""
