"""Sets in shards: making them, proving them, and saying what is in them.

`building` makes shards of a folder of images, of CIFAR's or ImageNet32's batches or of other shards;
`checking` reads every sample of finished ones; `survey` counts what they hold. Nothing here trains, and
nothing that trains needs this.
"""
