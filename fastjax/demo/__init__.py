"""The demo: a model made, tuned, exported and reloaded on this machine, offline. Run it by `python -m fastjax.demo`.

One module a stage: `world` invents facts and writes about them, `tokenizer` learns their spelling, `base` trains a tiny
Llama on the writing, `tuning` teaches it to answer questions by QLoRA, `answers` asks them (in a fresh process too),
`report` shows what came of it. `stages` runs these in order and judges the outcome.
"""
