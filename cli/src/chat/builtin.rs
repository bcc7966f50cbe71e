//! The chat formats that llama.cpp knows by name (`llama_chat_builtin_templates`), for `--chat-template NAME` and for
//! files without a template. The facts are those of llama.cpp's `src/llama-chat.cpp`; a golden test compares each.
//!
//! A row is a Jinja template in three pieces: what comes first, what each message gives, what opens the answer. In the
//! second `r` is the message's role, `c` its content, `t` the content without surrounding white space.

/// Name, before all messages, for each message, after them where an answer is to follow.
type Row = (&'static str, &'static str, &'static str, &'static str);

/// All rows, sorted by name.
const ROWS: &[Row] = &[
    (
        "bailing",
        "",
        "<role>{{ 'HUMAN' if r == 'user' else r|upper }}</role>{{ c }}",
        "<role>ASSISTANT</role>",
    ),
    (
        "bailing-think",
        "",
        "<role>{{ 'HUMAN' if r == 'user' else r|upper }}</role>{{ c }}",
        "<role>ASSISTANT</role><think>",
    ),
    (
        "bailing2",
        "{% if not messages or messages[0].role != 'system' %}<role>SYSTEM</role>detailed thinking off<|role_end|>{% endif %}",
        "<role>{{ 'HUMAN' if r == 'user' else r|upper }}</role>{{ c }}<|role_end|>",
        "<role>ASSISTANT</role>",
    ),
    ("chatglm3", "[gMASK]sop", "<|{{ r }}|>\n {{ c }}", "<|assistant|>"),
    ("chatglm4", "[gMASK]<sop>", "<|{{ r }}|>\n{{ c }}", "<|assistant|>\n"),
    ("chatml", "", "<|im_start|>{{ r }}\n{{ c }}<|im_end|>\n", "<|im_start|>assistant\n"),
    (
        "command-r",
        "",
        "{% if r in ['system', 'user', 'assistant'] %}<|START_OF_TURN_TOKEN|><|{{ {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[r] }}_TOKEN|>{{ t }}<|END_OF_TURN_TOKEN|>{% endif %}",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    (
        "deepseek",
        "",
        "{% if r == 'system' %}{{ c }}{% elif r == 'user' %}### Instruction:\n{{ c }}\n{% elif r == 'assistant' %}### Response:\n{{ c }}\n<|EOT|>\n{% endif %}",
        "### Response:\n",
    ),
    ("deepseek-ocr", "", "{{ c }}", ""),
    (
        "deepseek2",
        "",
        "{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}User: {{ c }}\n\n{% elif r == 'assistant' %}Assistant: {{ c }}<｜end▁of▁sentence｜>{% endif %}",
        "Assistant:",
    ),
    (
        "deepseek3",
        "",
        "{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}<｜User｜>{{ c }}{% elif r == 'assistant' %}<｜Assistant｜>{{ c }}<｜end▁of▁sentence｜>{% endif %}",
        "<｜Assistant｜>",
    ),
    (
        "exaone-moe",
        "",
        "{% if r in ['system', 'user', 'assistant', 'tool'] %}<|{{ r }}|>\n{{ t }}<|endofturn|>\n{% endif %}",
        "<|assistant|>\n",
    ),
    (
        "exaone3",
        "",
        "{% if r in ['system', 'user', 'assistant'] %}[|{{ r }}|]{{ t }}{{ '[|endofturn|]' if r != 'user' }}\n{% endif %}",
        "[|assistant|]",
    ),
    (
        "exaone4",
        "",
        "{% if r in ['system', 'user', 'assistant', 'tool'] %}[|{{ r }}|]{{ t }}{{ '[|endofturn|]' if r != 'user' }}\n{% endif %}",
        "[|assistant|]",
    ),
    ("falcon3", "", "<|{{ r }}|>\n{{ c }}\n", "<|assistant|>\n"),
    (
        "gemma",
        "",
        "{% if r == 'system' %}{% set ns.system = ns.system ~ t %}{% else %}<start_of_turn>{{ 'model' if r == 'assistant' else r }}\n{% if ns.system and r not in ['assistant', 'model'] %}{{ ns.system }}\n\n{% set ns.system = '' %}{% endif %}{{ t }}<end_of_turn>\n{% endif %}",
        "<start_of_turn>model\n",
    ),
    (
        "gigachat",
        "<s>",
        "{% if r == 'system' and loop.first %}{{ c }}<|message_sep|>{% elif r == 'user' %}user<|role_sep|>{{ c }}<|message_sep|>available functions<|role_sep|>[]<|message_sep|>{% elif r == 'assistant' %}assistant<|role_sep|>{{ c }}<|message_sep|>{% endif %}",
        "assistant<|role_sep|>",
    ),
    ("glmedge", "", "<|{{ r }}|>\n{{ c }}", "<|assistant|>"),
    (
        "gpt-oss",
        "",
        "<|start|>{{ r }}<|message|>{{ c }}{{ '<|return|>' if r == 'assistant' else '<|end|>' }}",
        "<|start|>assistant",
    ),
    (
        "granite",
        "",
        "<|start_of_role|>{{ r }}<|end_of_role|>{{ '<|tool_call|>' if r == 'assistant_tool_call' }}{{ c }}<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    ("granite-4.0", "", GRANITE_4, "<|start_of_role|>assistant<|end_of_role|>"),
    ("granite-4.1", "", GRANITE_4, "<|start_of_role|>assistant<|end_of_role|>"),
    (
        "grok-2",
        "",
        "{% if r == 'system' %}System: {{ t }}<|separator|>\n\n{% elif r == 'user' %}Human: {{ t }}<|separator|>\n\n{% elif r == 'assistant' %}Assistant: {{ c }}<|separator|>\n\n{% endif %}",
        "Assistant:",
    ),
    (
        "hunyuan-dense",
        "",
        "{% if r == 'system' and loop.first %}{{ c }}<｜hy_place▁holder▁no▁3｜>{% elif r == 'assistant' %}<｜hy_Assistant｜>{{ c }}<｜hy_place▁holder▁no▁2｜>{% elif r == 'user' %}<｜hy_User｜>{{ c }}<｜hy_Assistant｜>{% endif %}",
        "",
    ),
    (
        "hunyuan-moe",
        "",
        "{% if r == 'system' %}<|startoftext|>{{ c }}<|extra_4|>{% elif r == 'assistant' %}{{ c }}<|eos|>{% else %}<|startoftext|>{{ c }}<|extra_0|>{% endif %}",
        "",
    ),
    (
        "hunyuan-vl",
        "<｜hy_begin▁of▁sentence｜>",
        "{% if r == 'system' and loop.first %}{{ c }}<｜hy_place▁holder▁no▁3｜>{% elif r == 'user' %}{{ c }}<｜hy_User｜>{% elif r == 'assistant' %}{{ c }}<｜hy_Assistant｜>{% endif %}",
        "",
    ),
    (
        "kimi-k2",
        "",
        "{{ {'system': '<|im_system|>system<|im_middle|>', 'user': '<|im_user|>user<|im_middle|>', 'assistant': '<|im_assistant|>assistant<|im_middle|>', 'tool': '<|im_system|>tool<|im_middle|>'}.get(r, '') }}{{ c }}<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    (
        "llama2",
        "[INST] ",
        "{% if ns.open == false %}[INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}{{ c }}\n{% elif r == 'user' %}{{ c }} [/INST]{% else %}{{ c }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "llama2-sys",
        "[INST] ",
        "{% if ns.open == false %}[INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}<<SYS>>\n{{ c }}\n<</SYS>>\n\n{% elif r == 'user' %}{{ c }} [/INST]{% else %}{{ c }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "llama2-sys-bos",
        "[INST] ",
        "{% if ns.open == false %}<s>[INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}<<SYS>>\n{{ c }}\n<</SYS>>\n\n{% elif r == 'user' %}{{ c }} [/INST]{% else %}{{ c }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "llama2-sys-strip",
        "[INST] ",
        "{% if ns.open == false %}[INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}<<SYS>>\n{{ t }}\n<</SYS>>\n\n{% elif r == 'user' %}{{ t }} [/INST]{% else %}{{ t }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "llama3",
        "",
        "<|start_header_id|>{{ r }}<|end_header_id|>\n\n{{ t }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "llama4",
        "",
        "<|header_start|>{{ r }}<|header_end|>\n\n{{ t }}<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    (
        "megrez",
        "",
        "<|role_start|>{{ r }}<|role_end|>{{ c }}<|turn_end|>",
        "<|role_start|>assistant<|role_end|>",
    ),
    ("minicpm", "", "{% if r == 'user' %}<用户>{{ t }}<AI>{% else %}{{ t }}{% endif %}", ""),
    (
        "mistral-v1",
        "",
        "{% if not ns.open %} [INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}{{ c }} [/INST]{% else %} {{ c }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "mistral-v3",
        "",
        "{% if not ns.open %}[INST] {% set ns.open = true %}{% endif %}{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}{{ c }}[/INST]{% else %} {{ t }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "mistral-v3-tekken",
        "",
        "{% if not ns.open %}[INST]{% set ns.open = true %}{% endif %}{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}{{ c }}[/INST]{% else %}{{ c }}</s>{% set ns.open = false %}{% endif %}",
        "",
    ),
    (
        "mistral-v7",
        "",
        "{% if r == 'system' %}[SYSTEM_PROMPT] {{ c }}[/SYSTEM_PROMPT]{% elif r == 'user' %}[INST] {{ c }}[/INST]{% else %} {{ c }}</s>{% endif %}",
        "",
    ),
    (
        "mistral-v7-tekken",
        "",
        "{% if r == 'system' %}[SYSTEM_PROMPT]{{ c }}[/SYSTEM_PROMPT]{% elif r == 'user' %}[INST]{{ c }}[/INST]{% else %}{{ c }}</s>{% endif %}",
        "",
    ),
    ("monarch", "", "{{ '' if loop.first else '<s>' }}{{ r }}\n{{ c }}</s>\n", "<s>assistant\n"),
    (
        "openchat",
        "",
        "{{ c if r == 'system' else 'GPT4 Correct ' ~ r[:1]|upper ~ r[1:] ~ ': ' ~ c }}<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
    (
        "orion",
        "",
        "{% if r == 'system' %}{% set ns.system = ns.system ~ c %}{% elif r == 'user' %}Human: {% if ns.system %}{{ ns.system }}\n\n{% set ns.system = '' %}{% endif %}{{ c }}\n\nAssistant: </s>{% else %}{{ c }}</s>{% endif %}",
        "",
    ),
    (
        "pangu-embedded",
        "",
        "{{ '[unused9]系统：[unused10]' if loop.first and r != 'system' }}{% if r in names %}[unused9]{{ names[r] }}：{{ c }}[unused10]{% endif %}",
        "[unused9]助手：",
    ),
    ("phi3", "", "<|{{ r }}|>\n{{ c }}<|end|>\n", "<|assistant|>\n"),
    ("phi4", "", "<|im_start|>{{ r }}<|im_sep|>{{ c }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    (
        "rwkv-world",
        "",
        "{% if r == 'system' %}System: {{ t }}\n\n{% elif r == 'user' %}User: {{ t }}\n\n{{ 'Assistant:' if loop.last }}{% elif r == 'assistant' %}Assistant: {{ t }}\n\n{% endif %}",
        "",
    ),
    (
        "seed_oss",
        "",
        "<seed:bos>{{ r }}\n{{ t if r == 'assistant' else c }}<seed:eos>",
        "<seed:bos>assistant\n",
    ),
    (
        "smolvlm",
        "<|im_start|>",
        "{% if r == 'system' %}{{ c }}\n\n{% else %}{{ 'User' if r == 'user' else 'Assistant' }}: {{ c }}<end_of_utterance>\n{% endif %}",
        "Assistant:",
    ),
    ("solar-open", "", "<|begin|>{{ r }}<|content|>{{ c }}<|end|>", "<|begin|>assistant"),
    (
        "vicuna",
        "",
        "{% if r == 'system' %}{{ c }}\n\n{% elif r == 'user' %}USER: {{ c }}\n{% elif r == 'assistant' %}ASSISTANT: {{ c }}</s>\n{% endif %}",
        "ASSISTANT:",
    ),
    (
        "vicuna-orca",
        "",
        "{% if r == 'system' %}SYSTEM: {{ c }}\n{% elif r == 'user' %}USER: {{ c }}\n{% elif r == 'assistant' %}ASSISTANT: {{ c }}</s>\n{% endif %}",
        "ASSISTANT:",
    ),
    (
        "yandex",
        "",
        "{% if r == 'user' %} Пользователь: {{ c }}\n\n{% elif r == 'assistant' %} Ассистент: {{ c }}\n\n{% endif %}",
        " Ассистент:[SEP]",
    ),
    ("zephyr", "", "<|{{ r }}|>\n{{ c }}<|endoftext|>\n", "<|assistant|>\n"),
];

const GRANITE_4: &str = "<|start_of_role|>{{ 'assistant<|end_of_role|><|tool_call|>' if r == 'assistant_tool_call' else r ~ '<|end_of_role|>' }}{{ c }}<|end_of_text|>\n";

/// Names of all built-in templates, sorted.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.0)
}

/// The Jinja source of a built-in template; to be compiled with blocks taken verbatim.
pub fn source(name: &str) -> Option<String> {
    let (_, head, each, answer) = ROWS.iter().find(|row| row.0 == name)?;
    Some(format!(
        "{{% set ns = namespace(system='', open=none) %}}\
         {{% set names = {{'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', 'function': '方法'}} %}}\
         {head}{{% for m in messages %}}{{% set r = m.role %}}{{% set c = m.content %}}{{% set t = c|trim %}}{each}{{% endfor %}}\
         {{% if add_generation_prompt %}}{answer}{{% endif %}}"
    ))
}
