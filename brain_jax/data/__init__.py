"""From folders of images to batches on the devices."""
