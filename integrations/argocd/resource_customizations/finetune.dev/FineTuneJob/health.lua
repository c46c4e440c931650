-- Health of a FineTuneJob, from its conditions: Succeeded is always there, Reconciling and Stalled only while true.
local function condition(kind)
  for _, found in ipairs((obj.status or {}).conditions or {}) do
    if found.type == kind then
      return found
    end
  end
end

local succeeded = condition("Succeeded")
if succeeded == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "Waiting for the operator to look at this generation of the job." }
end

local health = { message = succeeded.message }
if condition("Stalled") ~= nil then
  -- Failed, or held up by a mistake in the spec: nothing happens unless somebody acts.
  health.status = "Degraded"
  health.message = condition("Stalled").message
elseif succeeded.status == "True" then
  health.status = "Healthy"
elseif condition("Reconciling") ~= nil then
  -- Also while it waits for a queue or a machine: it goes on by itself.
  health.status = "Progressing"
else
  -- On its way nowhere, and not ended: its author suspended it and its pods are gone.
  health.status = "Suspended"
end
return health
