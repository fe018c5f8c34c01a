"""Models and proposals that FAIR published in files of Torch7."""
