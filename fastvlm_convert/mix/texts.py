"""Questions without a picture: knowledge, instructions, code, arithmetic and other languages, in turns."""

from typing import Final

_KNOWLEDGE: Final = (
    "Which ocean lies between Africa and Australia?",
    "Why is the sky blue?",
    "Who wrote Don Quixote?",
    "How does a refrigerator work?",
    "Name three rivers in South America.",
    "What happens when water freezes?",
    "When did the Berlin Wall fall?",
    "What is photosynthesis?",
)
_INSTRUCTIONS: Final = (
    "Write a two-line poem about the sea.",
    "Give me a recipe for pancakes.",
    "Rewrite politely: Send me the file now.",
    "Suggest a name for a bakery.",
    "Explain compound interest to a child.",
    "List five things to pack for a hike.",
    "Write an email that declines an invitation.",
    "Give one argument for and one against homework.",
)
_CODE: Final = (
    "Write a Python class for a stack of numbers.",
    "What does `SELECT COUNT(*) FROM users;` do?",
    "Fix the bug: for i in range(10) print(i)",
    "Explain recursion with an example in C.",
    'Turn {"a": 1, "b": [2, 3]} into YAML.',
    "Write a regular expression for a phone number like 555-0199.",
    "How do I undo the last commit in git?",
    "Write a shell loop that renames every .jpeg file to .jpg.",
)
_LANGUAGES: Final = (
    "Qu'est-ce que l'énergie renouvelable ?",
    "请用一句话介绍长城。",
    "¿Cuál es la montaña más alta del mundo?",
    "Wie funktioniert ein Fahrradgetriebe?",
    "富士山の高さはどのくらいですか。",
    "Что такое чёрная дыра?",
    "لماذا تتغير فصول السنة؟",
    "भारत का राष्ट्रीय पक्षी कौन सा है?",
)
_ARITHMETIC: Final = (
    "What is 17 + 26?",
    "A train travels 180 km in 2 hours. How fast is it?",
    "What is 15 % of 80?",
    "Is 91 a prime number?",
    "Continue: 2, 4, 8, 16,",
    "Convert 5 miles to kilometers.",
    "How many minutes are in three days?",
    "Sort these numbers: 42, 7, 19, 3.",
)

TEXTS: Final = tuple(
    text
    for turn in zip(_KNOWLEDGE, _LANGUAGES, _INSTRUCTIONS, _CODE, _ARITHMETIC, strict=True)
    for text in turn
)
