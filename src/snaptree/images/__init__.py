"""Image files: opening them through one gate, reading and writing qcow2, making files durable."""
