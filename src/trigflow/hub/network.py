"""The network of a pipeline that was exported with format 1."""

from trigflow.deploy.pipeline_network import TrigFlowModel as TrigFlowModel
