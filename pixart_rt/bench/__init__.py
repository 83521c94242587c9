"""`pixart-rt bench`: how fast a bundle makes images, beside its peers and the machine's limits.

request.py      what is measured, checked
systems.py      ours and the peers behind one call, stages.py their clocks
cold.py         a fresh process to its first image
measure.py      warm repetitions in turn, agreement.py whether the images are the same
counts.py       operations and bytes of a request, roofline.py the least time they can take
run.py          all of it, to one JSON document; plots.py draws it
"""
