"""What serving engines load beside their own code, to serve checkpoints whose layers differ in size."""
