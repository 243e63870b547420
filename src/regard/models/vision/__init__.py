"""Networks for images, volumes and videos."""
