"""``python -m snaptree`` is the ``snaptree`` command."""

from snaptree.cli.main import main

main()
