"""The console command `sharpmask`."""
