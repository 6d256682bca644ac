"""Well-known public data sets by name: where each is on the hub, how its rows are read, and which stages may use it.

The names and the stages are Open-Assistant's. A set that is not here can be read all the same: with its hub name as `data.path`,
its format and its columns.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from app.config.data import DataConfig, SetConfig
from app.errors import DataError

Stage = Literal["sft", "rm", "ppo"]
Columns = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class PublicSet:
    """stages: which may train on the set. All other fields are named as the options of `data.sets` and mean the same."""

    path: str
    format: str
    columns: Columns = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ("sft",)
    phrases: tuple[str, ...] = ()
    fill_min_length: int = 0


def lookup(name: str, stage: Stage) -> PublicSet:
    """The set of this name, in any case. Raises DataError for an unknown name, and for a stage that may not use the set."""
    found = _find(name)
    if stage not in found.stages:
        raise DataError(f"the data set {name} is not made for {stage}, only for {', '.join(found.stages)}; name another set for {stage}")
    return found


def complete(config: DataConfig) -> DataConfig:
    """`config` with every set that has no path filled in from the table; what the set itself says stays. Raises DataError."""
    sets = {name: source if source.path is not None else _filled(name, source) for name, source in config.sets.items()}
    return config.model_copy(update={"sets": sets})


def _filled(name: str, source: SetConfig) -> SetConfig:
    known = {key: value for key, value in asdict(_find(name)).items() if value}
    return SetConfig.model_validate(known | source.model_dump(exclude_unset=True))


def _find(name: str) -> PublicSet:
    found = SETS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), SETS, n=3, cutoff=0.5)
        remedy = f"did you mean {', '.join(near)}?" if near else "docs/data_sets.md lists them"
        raise DataError(f"no public data set is called {name!r}; {remedy}, or give it a path (data.sets.{name}.path)")
    return found


def _answers(path: str, subset: str | None = None, **columns: str) -> PublicSet:
    """A set of questions and answers, or of texts and what was made of them."""
    return PublicSet(path, "instruction", columns, subset)


def _instructions(path: str, prompt: str = "INSTRUCTION", response: str = "RESPONSE", file: str = "", **columns: str) -> PublicSet:
    """A set of instructions, without answers that refuse them."""
    columns = {"prompt": prompt, "response": response, **columns}
    return PublicSet(path, "instruction", columns, files=(file,) if file else (), phrases=("refusals",))


def _translations(pair: str, source: str, language: str) -> PublicSet:
    first, second = pair.split("-")
    prompt = f"Translate this from {source} into {language}:\n\n{{translation.{first}}}"
    return _answers("wmt/wmt19", pair, prompt=prompt, response=f"translation.{second}")


_QUESTIONS = {
    "squad_v2": _answers("rajpurkar/squad_v2", prompt="{context}\n\n{question}", response="answers.text.0"),
    "trivia_qa_nocontext": _answers("mandarjoshi/trivia_qa", "rc.nocontext", prompt="question", response="answer.value"),
    "trivia_qa_context": _answers(
        "mandarjoshi/trivia_qa", "rc", prompt="{search_results.search_context.0}\n\n{question}", response="answer.value"
    ),
    "adversarial_qa": _answers(
        "UCLNLP/adversarial_qa", "adversarialQA", prompt="{title}\n\n{context}\n\n{question}", response="answers.text.0"
    ),
    "gsm8k": _answers("openai/gsm8k", "main", prompt="question", response="answer"),
    "gsm8k_hard": _answers(
        "reasoning-machines/gsm-hard",
        prompt="{input}\n\nAnswer with a short Python program.",
        response="```python\n{code}\n```\nIt gives {target}.",
    ),
    "wikihow": _answers("b-mc2/wikihow_lists", prompt="{title}? Explain it step by step.", response="result"),
    "essay_instruction": _answers("ChristophSchuhmann/essays-with-instructions", prompt="instructions", response="{titles}\n\n{essays}"),
    "math_qa": _answers("allenai/math_qa", prompt="{Problem}\n{options}", response="Rationale"),
}
_SUMMARIES = {
    "xsum": _answers("EdinburghNLP/xsum", prompt="Summarise this article in one sentence:\n\n{document}", response="summary"),
    "cnn_dailymail": _answers("abisee/cnn_dailymail", "3.0.0", prompt="Summarise this article:\n\n{article}", response="highlights"),
    "samsum": _answers("knkarthick/samsum", prompt="Summarise this conversation:\n\n{dialogue}", response="summary"),
    "multi_news": _answers("alexfabbri/multi_news", prompt="Summarise these articles:\n\n{document}", response="summary"),
    "scitldr": _answers("allenai/scitldr", "AIC", prompt="Summarise this paper in one sentence:\n\n{source}", response="target.0"),
    "billsum": _answers("FiscalNote/billsum", prompt="Summarise this bill:\n\n{text}", response="summary"),
    "debate_sum": _answers("Hellisotherpeople/DebateSum", prompt="Quote what matters in this text:\n\n{Full-Document}", response="Extract"),
    "tldr_news": _answers("JulesBelveze/tldr_news", prompt="Write a headline for this text:\n\n{content}", response="headline"),
}
_TRANSLATIONS = {
    f"wmt2019_{pair}": _translations(pair, *languages)
    for pair, languages in {
        "cs-en": ("Czech", "English"),
        "de-en": ("German", "English"),
        "fi-en": ("Finnish", "English"),
        "fr-de": ("French", "German"),
        "gu-en": ("Gujarati", "English"),
        "kk-en": ("Kazakh", "English"),
        "lt-en": ("Lithuanian", "English"),
        "ru-en": ("Russian", "English"),
        "zh-en": ("Chinese", "English"),
    }.items()
}
_INSTRUCTIONS = {
    "humaneval_mbpp_codegen_qa": _instructions("OllieStanley/humaneval-mbpp-codegen-qa"),
    "humaneval_mbpp_testgen_qa": _instructions("OllieStanley/humaneval-mbpp-testgen-qa"),
    "grade_school_math_instructions": _instructions("qwedsacf/grade-school-math-instructions"),
    "recipes": _instructions("dctanner/oa_recipes"),
    "ubuntu_dialogue_qa": _instructions("sedthh/ubuntu_dialogue_qa"),
    "cmu_wiki_qa": _instructions("sedthh/cmu_wiki_qa"),
    "youtube_subs_howto100m": _instructions("totuta/youtube_subs_howto100M"),
    "iapp_wiki_qa_squad": _instructions("wannaphong/iapp_wiki_qa_squad_oa"),
    "zhihu-kol": _instructions("wangrui6/zhihu-kol"),
    "minimath": _instructions("kentsui/minimath", "question", "answer"),
    "oa_wiki_qa_bart_10000row": _instructions("michaelthwan/oa_wiki_qa_bart_10000row"),
    "oa_leet10k": _instructions("ehartford/oa_leet10k"),
    "poem_instructions": _instructions("checkai/instruction-poems"),
    "oa_stackexchange": _instructions("donfu/oa-stackexchange"),
    "tell_a_joke": _instructions("mikegarts/oa_tell_a_joke_20000"),
    "wizardlm_70k": _instructions("ehartford/WizardLM_alpaca_evol_instruct_70k_unfiltered", "instruction", "output"),
    "megacode": _instructions("rombodawg/MegaCodeTraining112k", "prompt", "completion", "RombosCodeTraining112k.json"),
    "megacode2": _instructions(
        "rombodawg/LosslessMegaCodeTrainingV2_1m_Evol_Uncensored",
        "USER",
        "ASSISTANT",
        "DeDuped_LosslessMegaCodeTrainingV2_942k_Evol_Uncensored.json",
    ),
    "megacode3": _instructions(
        "rombodawg/LosslessMegaCodeTrainingV3_2.2m_Evol", "USER", "ASSISTANT", "LosslessMegaCodeTrainingV3_2.2m_Evol.json"
    ),
    "evol_instruct_code": _instructions("nickrosh/Evol-Instruct-Code-80k-v1", "instruction", "output"),
    "evol-codealpaca-v1": _instructions("theblackcat102/evol-codealpaca-v1", "instruction", "output"),
    "cot_submix_original": _instructions("conceptofmind/cot_submix_original", "inputs", "targets"),
    "alpaca": PublicSet("yahma/alpaca-cleaned", "instruction", stages=("sft", "ppo"), phrases=("refusals",)),
    "code_alpaca": _instructions("sahil2801/CodeAlpaca-20k", "instruction", "output"),
    "alpaca_gpt4": _instructions("teknium/GPT4-LLM-Cleaned", "instruction", "output"),
    "gpt4all": _instructions("Nebulous/gpt4all_pruned", "prompt", "response", "data_singleround_pruned_3.jsonl"),
    "dolly15k": _instructions("OllieStanley/oa_dolly_15k", input="METADATA.CONTEXT"),
    "dolly15k_multilingual": PublicSet(
        "argilla/databricks-dolly-15k-curated-multilingual",
        "instruction",
        {"prompt": "instruction", "response": "response", "input": "context"},
        split="de+en+es+fr",
        phrases=("refusals",),
    ),
    "multi-chapter-summaries": _answers("shahules786/Multi-chapter-summaries", prompt="{context}\n\n{prompt}", response="summary"),
    "dolphin-mix": PublicSet(
        "ehartford/dolphin",
        "instruction",
        {"system": "instruction", "prompt": "input", "response": "output"},
        files=("flan5m-alpaca-uncensored.jsonl",),
        fill_min_length=8000,
    ),
    "joke": _answers(
        "https://gist.github.com/theblackcat102/42b697e24a13fdb499e20edfbf618361/raw/1834dca207898c15f93b809d1195f6f6e47c9e1e/joke_explained.jsonl",
        prompt="Explain this joke:\n\n{joke}",
        response="explaination",
    ),
    "prosocial_dialogue": _answers("Englishman2022/prosocial-dialog-filtered", prompt="context", response="rots.0"),
    "explain_prosocial": _answers(
        "Englishman2022/prosocial-dialog-filtered",
        prompt="Say why this was rated {safety_annotations.0}:\n\n{context}",
        response="safety_annotation_reasons.0",
    ),
}
_DIALOGUES = {
    "vicuna": PublicSet(
        "Aeala/ShareGPT_Vicuna_unfiltered",
        "messages",
        {"messages": "conversations"},
        files=("ShareGPT_V4.3_unfiltered_cleaned_split.json",),
        stages=("sft", "ppo"),
    ),
    "wizard_evol_instruct_v2": PublicSet(
        "ehartford/WizardLM_evol_instruct_V2_196k_unfiltered_merged_split",
        "messages",
        {"messages": "conversations"},
        files=("WizardLM_evol_instruct_V2_196k_unfiltered_merged_split.json",),
    ),
    "soda": PublicSet("allenai/soda", "messages", {"messages": "dialogue", "system": "{narrative} You are {speakers.1}."}),
    "soda_dialogue": PublicSet("emozilla/soda_synthetic_dialogue", "messages", {"messages": "conversation"}),
    "orca-chat": PublicSet(
        "shahules786/orca-chat",
        "messages",
        {"messages": "conversation", "system": "instruction"},
        files=("orca-chat-gpt4.json",),
    ),
}
_RANKED = {
    "oasst_export": PublicSet("OpenAssistant/oasst1", "oasst", split="train+validation", stages=("sft", "rm", "ppo")),
    "anthropic_rlhf": PublicSet("Anthropic/hh-rlhf", "hh", split="train+test", stages=("rm",)),
    "webgpt": PublicSet(
        "openai/webgpt_comparisons",
        "ranking",
        {"prompt": "question.full_text", "responses": ("answer_0", "answer_1"), "scores": ("score_0", "score_1")},
        stages=("rm", "ppo"),
    ),
    "shp": PublicSet(
        "stanfordnlp/SHP",
        "ranking",
        {"prompt": "history", "responses": ("human_ref_A", "human_ref_B"), "scores": ("score_A", "score_B")},
        split="train+validation",
        stages=("rm",),
    ),
    "hellaswag": PublicSet(
        "Rowan/hellaswag",
        "ranking",
        {"prompt": "Finish this text:\n\n{ctx}", "responses": "endings", "best": "label"},
        split="train+validation",
        stages=("rm",),
    ),
    "hf_summary_pairs": PublicSet(
        "openai/summarize_from_feedback",
        "ranking",
        {
            "prompt": "Summarise this post:\n\n{info.post}",
            "responses": ("summaries.0.text", "summaries.1.text"),
            "best": "choice",
        },
        "comparisons",
        "train+validation",
        stages=("rm", "ppo"),
    ),
}
_RAW = {"red_pajama": PublicSet("togethercomputer/RedPajama-Data-1T-Sample", "text", {"text": "text"})}

SETS: Mapping[str, PublicSet] = {**_QUESTIONS, **_SUMMARIES, **_TRANSLATIONS, **_INSTRUCTIONS, **_DIALOGUES, **_RANKED, **_RAW}
