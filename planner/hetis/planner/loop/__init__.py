"""The loop from measured traffic to the next plan: drift, forecast, decision, and rehearsals of it in virtual time.

Everything is pure: traffic, plans and times go in, decisions come out. The planner's proposals and rehearsals call the
same `decision.decide`.
"""
