"""persona from other tools: the LiteLLM proxy, LangChain agents and the OpenAI client for JavaScript."""
