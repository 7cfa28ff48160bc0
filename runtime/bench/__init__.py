"""How fast is it? Latency, profiles, statistics, facts about the machine."""
