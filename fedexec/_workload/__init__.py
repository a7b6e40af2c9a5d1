"""The job: the tutorial's small CNN on real handwritten digits (or CIFAR-10), split over clients.

Workers import this, so nothing here imports Flower; :mod:`.data` needs numpy only, :mod:`.training` torch.
"""
