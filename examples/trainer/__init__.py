"""What the scripts in examples/ share. README.md in this folder draws how the modules fit together."""
