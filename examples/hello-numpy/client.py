"""A client without torch: every site adds 1 to the model it receives."""

import fedpool.client as flare

flare.init()
while flare.is_running():
    input_model = flare.receive()
    print(f"{flare.get_site_name()} received {input_model.params['numpy_key'].tolist()}")
    params = {name: value + 1 for name, value in input_model.params.items()}
    flare.send(flare.FLModel(params=params))
