"""A program that knows nothing of pruning: `python examples/ask.py MODEL PICTURE QUESTION`."""

import sys

from transformers import pipeline


model, picture, question = sys.argv[1:]
content = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
answer = pipeline("image-text-to-text", model=model)(text=[{"role": "user", "content": content}], max_new_tokens=20)
print(answer[0]["generated_text"][-1]["content"])
