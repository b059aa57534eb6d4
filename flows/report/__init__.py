"""What people see: lines, tables, results, reports."""
