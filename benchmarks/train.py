"""What training from cached soft labels costs beside supervised training, and beside having the teacher in the loop.

    python benchmarks/train.py [--quick] [--json] [--device cuda]

Three runs of the same student on Fashion-MNIST, same batch size, same augmentation, one optimizer step each in turns
of some seconds: supervised (labels alone), cached (an eighth of each batch is labeled, the soft labels of the rest
come from a store), online (the same batches, but the teacher labels them in the loop). All three are driven by the
step and the loader of `pseudolabel.train`; batches are loaded in the loop on a CPU, by processes beside a GPU. Read
the table so:

    cached ÷ supervised     time of a step, loading included; wanted: at most about 1.03
    cached ÷ online         time of a step; the less, the more the cache saves
    floor                   of the latter: 1 − the teacher's share of an online step, timed alone. A cache that cost
                            nothing to read would reach it
    epochs to pay           after so many passes over the unlabeled rows, annotating once (dense, one process) and
                            training from the cache has taken less time than online training

On a CPU everything runs on one thread and CPU time is taken, which a busy machine distorts less.
"""
