"""Where arrays lie on the devices, and what is compiled for them."""
