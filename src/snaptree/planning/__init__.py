"""The verbs of snaptree, pure: ``(Tree, Survey, request) -> Plan``. Nothing in this package does I/O."""
