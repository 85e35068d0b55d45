"""The open world, in the making: prompts that leave things free, and an exact judge of what images show."""
