"""libvirt: what it keeps of a domain and of its snapshots, read and written through its official calls only."""
