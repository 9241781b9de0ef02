"""`fedpool migrate`: turn NVFlare scripts into fedpool scripts.

`names` maps names, `rewrite` changes a source's imports, and `remarks` lists what is left to do by
hand.
"""
