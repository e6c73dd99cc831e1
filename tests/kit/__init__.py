"""What the tests share: real images, a machine whose contents are known, file systems of their own, faults."""
