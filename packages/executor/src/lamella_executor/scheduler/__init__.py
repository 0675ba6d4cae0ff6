"""Packs requests into steps: scheduler, capacity policies, and the plan of a step."""
