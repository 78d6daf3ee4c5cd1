"""Tables that separate personalisation from task tuning: methods, controls, floors, intervals, report."""
