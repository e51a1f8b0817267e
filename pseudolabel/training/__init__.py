"""A training from its parts; `pseudolabel.train` puts them together.

setup        all inputs read and checked, one value that says what is trained
inputs       shards, labels, soft labels, joined
rows, order  a stream of rows; which comes when
views, image_cache       what the student sees; decoded once
mixing       two images in one
label_balance            labels that are uneven
loop, learner, optim     step after step; the step
validate, step_times, tracking    accuracy; where time goes; who is told
starting     weights to start from
world, distributed       several processes that train together
"""
