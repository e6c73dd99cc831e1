"""The nouns of snaptree, pure: nothing in this package does I/O."""
