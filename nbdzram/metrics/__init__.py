"""What a monitoring system reads: metrics, health, and a status page."""
