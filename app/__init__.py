"""Corral: train a chat assistant from human feedback on Ray.

Read in this order: `experience` (what flows), `interfaces` (who touches it), `stages` (the stages of a run),
`workers` (everything that talks to Ray, DeepSpeed and vLLM), `numerics` and `algorithms` (the mathematics).
"""
