"""How trainers' reports reach the operator: certificates, who may report, and the newest report of each job."""
