"""Sites score the model that they receive; the best global model is the one that scored best."""

from collections.abc import Callable

from fedpool import Run

CLIENT = """
import fedpool.client as flare

flare.init()
while flare.is_running():
    input_model = flare.receive()
    w = float(input_model.params["w"][0])
    score = 1 - abs(w - 2) / 10          # best at w == 2

    if flare.is_evaluate():               # the last model is scored in a round of its own
        flare.send(flare.FLModel(metrics={"accuracy": score}))
        continue

    flare.send(flare.FLModel(params={"w": input_model.params["w"] + 1}, metrics={"accuracy": score}))
"""


def test_the_score_belongs_to_the_received_model(run_job: Callable[..., Run]) -> None:
    """Model r has w == r: of the models 0 to 4, model 2 scores best."""
    result = run_job(CLIENT, num_rounds=4).get_result()
    assert [round(metrics["accuracy"], 6) for metrics in result.metrics] == [0.8, 0.9, 1.0, 0.9, 0.8]
    assert result.best_round == 2
    assert float(result.best_params["w"][0]) == 2
    assert float(result.params["w"][0]) == 4
