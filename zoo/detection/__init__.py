"""Detection, segmentation of instances, keypoints."""
