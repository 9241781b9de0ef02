"""Turning scripts written for NVFlare into scripts of fedpool's: `fedpool migrate`.

`names` says what stands for what, `rewrite` changes the imports of a source, `remarks` says what is
left to do by hand.
"""
