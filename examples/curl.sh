#!/usr/bin/env bash
# Every endpoint of the server, with curl.
#
#     jaxpaged serve demo --tool-call-parser hermes     # in another terminal
#     examples/curl.sh [URL]                            # default: $JAXPAGED_URL, or http://localhost:8000
set -euo pipefail

URL=${1:-${JAXPAGED_URL:-http://localhost:8000}}
KEY=${JAXPAGED_API_KEY:-none}

get() { # PATH
  printf '\n== GET %s\n' "$1"
  curl --silent --show-error --fail-with-body --header "Authorization: Bearer $KEY" "$URL$1"
  echo
}

post() { # PATH, JSON BODY
  printf '\n== POST %s\n' "$1"
  curl --silent --show-error --fail-with-body --no-buffer --header "Authorization: Bearer $KEY" \
    --header 'Content-Type: application/json' --data "$2" "$URL$1"
  echo
}

MESSAGES='[{"role": "user", "content": "What is the capital of France?"}]'

# -- OpenAI's
get /v1/models
post /v1/completions '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
post /v1/chat/completions "{\"messages\": $MESSAGES, \"max_tokens\": 16, \"temperature\": 0}"
# A stream: --no-buffer shows each event when it comes.
post /v1/chat/completions "{\"messages\": $MESSAGES, \"max_tokens\": 8, \"stream\": true, \"stream_options\": {\"include_usage\": true}}"
# A forced tool call.
post /v1/chat/completions "{\"messages\": $MESSAGES, \"max_tokens\": 40, \"temperature\": 0, \"tool_choice\": \"required\", \"tools\":
  [{\"type\": \"function\", \"function\": {\"name\": \"capital\", \"parameters\": {\"type\": \"object\"}}}]}"

# The Responses API, and Anthropic's Messages.
post /v1/responses '{"input": "What is the capital of France?", "max_output_tokens": 16, "temperature": 0}'
post /v1/messages "{\"messages\": $MESSAGES, \"max_tokens\": 16, \"temperature\": 0}"
post /v1/messages/count_tokens "{\"messages\": $MESSAGES}"
post /v1/embeddings '{"input": ["The capital of France is Paris.", "It rains."], "dimensions": 4}'

# -- tokens
post /tokenize '{"prompt": "The capital of France is", "return_token_strs": true}'
post /detokenize '{"tokens": [1, 2, 3]}'
# The exact prompt that a request becomes: where a chat template surprises, look here first.
post /render "{\"messages\": $MESSAGES}"
post /v1/chat/completions/render "{\"messages\": $MESSAGES}"
post /v1/completions/render '{"prompt": "The capital of France is"}'
# Token ids in, token ids out, with log probabilities: for reinforcement learning.
post /inference/v1/generate '{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "temperature": 0, "logprobs": 1}}'

# -- for those who run it
get /health
get /version
get /load
get /metrics
get /openapi.json
post /reset_prefix_cache '{}'
# Aborts the requests with these ids (they stand in the answers); without request_ids: all of them.
post /abort_requests '{"request_ids": ["chatcmpl-0"]}'
# LoRA adapters, for a server that was started with --enable-lora --allow-runtime-lora-updating (others say so: 403).
post /v1/load_lora_adapter '{"lora_name": "sql", "lora_path": "/adapters/sql"}' || true
post /v1/unload_lora_adapter '{"lora_name": "sql"}' || true
