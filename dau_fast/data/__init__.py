"""Images and their sets, from where they are kept to the batches that a step takes.

named: the data sets that have a name, and `load`, which reads one.
folder, arrays, arrow: one kind of data set each that may be larger than memory.
stored: what these three have in common, and whether their images are streamed.
decoding: encoded images as pixels, by several threads.
sets: a caller's own sets, tensors or Datasets.
images: images in memory, and batches of them.
streaming: the same batches of images that are read while earlier ones are trained on.
split: what is to be forgotten, the role of every image, and the sets of a run.
memory, paths, progress: what the others share.

Nothing is imported here; torchvision, Pillow, pyarrow and scikit-learn are when a data set needs them.
"""
