"""One shard annotated, in a worker; `pseudolabel.annotate` gives shards to workers.

work         settings and teacher → what a worker does
line         decoded → forward → part on disk, overlapped
forward      the teacher's pass and the encoding of its logits
batch_size   the largest that fits
reannotate   labels made again, to compare
"""
