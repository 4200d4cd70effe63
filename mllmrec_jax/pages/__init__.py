"""What HTML reports are made of: one file each, without scripts and without any request."""
