"""The findings by name: `regard study NAME` makes each (see `regard.study.finding`)."""

#: name -> what it shows, in a line; the module in `regard.study.findings` has underscores for its hyphens
FINDINGS: dict[str, str] = {
    "act": "Attention sinks inside the text, and what calibrating them is worth",
    "disrt": "Who notices that the arrangement of a picture is gone",
    "gcog": "What attention between a rule and a scene is good for, and what it does not bring",
    "generative-ai-paradox": "What models produce, beside what they recognise",
    "in-context": "Which predictor the heads of in-context regression become",
    "moa-sparse": "Spans of its own for every head of SmolLM2, beside equal windows of the same memory",
    "preplan-anchor": "What the rhythm of attention says about generated tokens, and what credit from it is worth",
    "random-features": "What one attention layer of random features learns, and from how many samples",
    "retrieval-heads": "Which heads of a language model copy facts out of its context, and what it knows without them",
    "s2t-cross-attention": "How much of a speech model's saliency its cross-attention shows",
    "saliency": "Saliency maps: where they point, and what the class hangs on",
    "vit-head-analytics": "Which heads of vision transformers matter, how far they look, and their patterns",
}
