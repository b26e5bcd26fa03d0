"""One UNet step of this project and of its peers, timed side by side."""
