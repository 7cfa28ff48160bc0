"""What goes to a device: archives, plugin kernels, the launcher library."""
