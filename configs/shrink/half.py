"""Half the parameters of the demo's target in two rounds, the student healed after each, then 8-bit weights.

A round keeps seven tenths of what is there, by the shape that the search of `xlathe prune` finds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "rounds": (
                "prune_structured{params=0.71,score=activation}",
                "prune_structured{params=0.71,score=activation}",
            ),
            "tokens": 98_304,
            "loss": "forward_kl,features",
            "learning_rate": 4e-3,
            "rows": 4,
            "context": 512,
            "quantize": "quantize{scheme=int8}",
        }
    )
