"""A pipeline that was exported with format 1."""

from trigflow.deploy.pipeline import TrigFlowPipeline as TrigFlowPipeline
