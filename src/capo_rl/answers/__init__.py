r"""What an answer is: where it stands in a completion, and when it equals the reference answer.

Text and numbers are compared here and at once; the rest is algebra, which `grading` runs in processes that may die. The
rules follow what the sets' own graders do: several answers in any order and a stated tolerance, from OlympiadBench's
judge (https://github.com/OpenBMB/OlympiadBench); units, scientific notation and a relative tolerance, from
Minerva's normalisation in lm-evaluation-harness and from Qwen2.5-Math's evaluation.

Read `rule` and `extraction`; then `notation`, one spelling for all that follows, and `units`; then what a text may be,
`words`, `numbers`, `lists`, `intervals`, `equations`; then `equality`, which decides, with `algebra` and its short cut
`formula`. Each imports only what stands before it, and `equality` all.
"""

from capo_rl.answers.equality import judge as judge
from capo_rl.answers.equality import quick as quick
from capo_rl.answers.equality import readable as readable
from capo_rl.answers.equations import value as value
from capo_rl.answers.extraction import LONGEST_ANSWER as LONGEST_ANSWER
from capo_rl.answers.extraction import TAIL as TAIL
from capo_rl.answers.extraction import extract_answer as extract_answer
from capo_rl.answers.extraction import final_text as final_text
from capo_rl.answers.extraction import stated_answer as stated_answer
from capo_rl.answers.lists import matched as matched
from capo_rl.answers.lists import parts as parts
from capo_rl.answers.notation import bare as bare
from capo_rl.answers.notation import squeezed as squeezed
from capo_rl.answers.numbers import Number as Number
from capo_rl.answers.numbers import close as close
from capo_rl.answers.numbers import number as number
from capo_rl.answers.numbers import same_number as same_number
from capo_rl.answers.rule import KINDS as KINDS
from capo_rl.answers.rule import Rule as Rule
from capo_rl.answers.units import without_unit as without_unit
from capo_rl.answers.words import letter as letter
