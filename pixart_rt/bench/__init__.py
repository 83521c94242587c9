"""`pixart-rt bench`: how fast a bundle makes images, next to its peers and the machine's limits.

request.py      a measurement's settings, checked
systems.py      ours and the peers behind one call, stages.py their clocks
cold.py         a fresh process to its first image
measure.py      warm repetitions in turn, agreement.py whether the images are the same
counts.py       operations and bytes of a request, roofline.py the machine's rates and floors
run.py          all of it, to one JSON document; plots.py draws it

A checkout's benchmarks/ stands on the same:
timing.py       the one loop that times, gpu_lock.py turns of processes that share a GPU
provenance.py   the record of every result file, and the file
charts.py       the look of every picture
"""
