"""The job: the tutorial's small CNN on real handwritten digits (or CIFAR-10), split over clients.

Workers import this package, so nothing in it imports Flower; :mod:`.data` needs only numpy, :mod:`.training`
needs torch.
"""
