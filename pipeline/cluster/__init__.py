"""Ray: the session, the stages of a job, submitted jobs, KubeRay."""

from refinedet.pipeline.runs import settings

settings.provide_ray_token()  # here, since Ray reads it when it is imported, as the files below do
