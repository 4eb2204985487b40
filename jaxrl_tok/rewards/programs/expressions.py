"""Compiles expressions to instructions; statements are in compiler.py."""

import ast

from jaxrl_tok.rewards.programs import control, ops
from jaxrl_tok.rewards.programs.scopes import (
  comprehension_scope,
  make_scope,
)
from jaxrl_tok.rewards.programs.values import BudgetError, LanguageError

READABLE = ('__name__',)  # of the names with two underscores around them


class Label:
  """A place in the instructions, known once it is marked."""

  __slots__ = ('at',)

  def __init__(self):
    self.at = -1


class Expressions:
  """Half of a Compiler: expressions, targets and functions."""

  def expression(self, node) -> None:
    name = type(node).__name__
    method = getattr(self, f'on_{name}', None)
    if method is None:
      raise LanguageError(f'line {self.line}: no {name} in the subset')
    method(node)

  # --- names

  def checked(self, name: str) -> str:
    """A name as its scope has it; refuses __names__."""
    if name.startswith('__') and name.endswith('__') and name not in READABLE:
      raise LanguageError(f'line {self.line}: no {name} in the subset')
    return self.scope.mangle(name)

  def attribute_name(self, name: str) -> str:
    return self.checked(name)

  def load_name(self, name: str) -> None:
    name = self.checked(name)
    hops = self.scope.hops(name)
    if hops is None:
      if name in self.builtin:
        self.emit(ops.load_builtin, name)
      else:
        self.emit(ops.load_global, name)
    elif hops == 0:
      if self.scope.kind == 'class':
        self.emit(ops.load_class_name, (name, self.outer_hops(name)))
      else:
        self.emit(ops.load_local, name)
    else:
      self.emit(ops.load_outer, (name, hops))

  def outer_hops(self, name: str) -> int | None:
    """Calls outwards to a class body's name outside of the class."""
    hops = self.scope.parent.hops(name, own=False)
    return None if hops is None else hops + 1

  def store_name(self, name: str, definition: bool = False) -> None:
    if not definition:
      name = self.checked(name)
    name = self.scope.mangle(name)
    hops = self.scope.hops(name)
    if hops is None:
      self.emit(ops.store_global, name)
    elif hops == 0:
      self.emit(ops.store_local, name)
    else:
      self.emit(ops.store_outer, (name, hops))

  def delete_name(self, name: str) -> None:
    name = self.checked(name)
    self.emit(ops.delete_name, (name, self.scope.hops(name)))

  def on_Name(self, node):
    self.load_name(node.id)

  def on_NamedExpr(self, node):
    if self.scope.kind == 'comprehension' and node.target.id in (
      self.scope.bound
    ):
      raise SyntaxError(f':= cannot rebind {node.target.id}')
    self.expression(node.value)
    self.emit(ops.dup)
    self.store_name(node.target.id)

  # --- targets

  def store(self, target) -> None:
    if isinstance(target, ast.Name):
      self.store_name(target.id)
    elif isinstance(target, ast.Subscript):
      self.expression(target.value)
      self.expression(target.slice)
      self.emit(ops.store_subscript)
    elif isinstance(target, ast.Attribute):
      self.expression(target.value)
      self.emit(ops.store_attr, self.attribute_name(target.attr))
    elif isinstance(target, ast.Tuple | ast.List):
      self.store_items(target.elts)
    else:
      raise SyntaxError(f'cannot assign, line {self.line}')

  def store_items(self, targets: list) -> None:
    stars = [i for i, t in enumerate(targets) if isinstance(t, ast.Starred)]
    if len(stars) > 1:
      raise SyntaxError('multiple starred expressions in assignment')
    before = stars[0] if stars else len(targets)
    self.emit(ops.take, None if stars else len(targets) + 1)
    after = len(targets) - before - 1 if stars else None
    self.emit(ops.unpack, (before, after))
    for target in targets:
      self.store(target.value if isinstance(target, ast.Starred) else target)

  # --- constants and displays

  def on_Constant(self, node):
    value = node.value
    if type(value) not in (int, float, str, bool, type(None)):
      raise LanguageError(
        f'line {self.line}: no {type(value).__name__} constants in the subset'
      )
    if type(value) is int and value.bit_length() > self.budget.int_bits:
      raise BudgetError(f'an integer of more than {self.budget.int_bits} bits')
    self.emit(ops.const, value)

  def on_JoinedStr(self, node):
    for part in node.values:
      self.expression(part)
    self.emit(ops.build_string, len(node.values))

  def on_FormattedValue(self, node):
    self.expression(node.value)
    if node.format_spec is not None:
      self.expression(node.format_spec)
    conversion = '' if node.conversion == -1 else chr(node.conversion)
    self.emit(ops.format_value, (conversion, node.format_spec is not None))

  def items(self, nodes: list, operation) -> None:
    """A list of nodes, stars among them; then operation makes it another."""
    if not any(isinstance(node, ast.Starred) for node in nodes):
      for node in nodes:
        self.expression(node)
      self.emit(operation, len(nodes))
      return
    self.emit(ops.build_list, 0)
    for node in nodes:
      if isinstance(node, ast.Starred):
        self.expression(node.value)
        self.emit(ops.take, None)
        self.emit(ops.extend_list)
      else:
        self.expression(node)
        self.emit(ops.append_item, 1)
    if operation is not ops.build_list:
      self.emit(ops.from_list, operation)

  def on_List(self, node):
    self.items(node.elts, ops.build_list)

  def on_Tuple(self, node):
    self.items(node.elts, ops.build_tuple)

  def on_Set(self, node):
    self.items(node.elts, ops.build_set)

  def on_Dict(self, node):
    self.emit(ops.build_dict)
    for key, value in zip(node.keys, node.values):
      if key is not None:
        self.expression(key)
      self.expression(value)
      self.emit(ops.add_pair if key is not None else ops.merge_dict, 1)

  def on_Slice(self, node):
    for part in (node.lower, node.upper, node.step):
      if part is None:
        self.emit(ops.const, None)
      else:
        self.expression(part)
    self.emit(ops.build_slice)

  # --- operators

  def on_BinOp(self, node):
    self.expression(node.left)
    self.expression(node.right)
    self.emit(ops.binary, type(node.op).__name__)

  def on_UnaryOp(self, node):
    self.expression(node.operand)
    self.emit(ops.unary, type(node.op).__name__)

  def on_BoolOp(self, node):
    end = Label()
    jump = control.keep_if_false if isinstance(node.op, ast.And) else None
    for value in node.values[:-1]:
      self.expression(value)
      self.emit(jump or control.keep_if_true, end)
    self.expression(node.values[-1])
    self.mark(end)

  def on_Compare(self, node):
    self.expression(node.left)
    cleanup, end = Label(), Label()
    for i, (operator, right) in enumerate(zip(node.ops, node.comparators)):
      self.expression(right)
      last = i == len(node.comparators) - 1
      if not last:
        self.emit(ops.dup_under)
      self.emit(ops.compare, type(operator).__name__)
      if not last:
        self.emit(control.keep_if_false, cleanup)
    if len(node.ops) > 1:
      self.emit(control.jump, end)
      self.mark(cleanup)
      self.emit(ops.swap)
      self.emit(ops.pop)
      self.mark(end)

  def on_IfExp(self, node):
    other, end = Label(), Label()
    self.expression(node.test)
    self.emit(control.jump_if_false, other)
    self.expression(node.body)
    self.emit(control.jump, end)
    self.mark(other)
    self.expression(node.orelse)
    self.mark(end)

  def on_Subscript(self, node):
    self.expression(node.value)
    self.expression(node.slice)
    self.emit(ops.subscript)

  def on_Attribute(self, node):
    is_super = (
      isinstance(node.value, ast.Call)
      and isinstance(node.value.func, ast.Name)
      and node.value.func.id == 'super'
    )
    name = node.attr
    if not (is_super and name == '__init__'):
      name = self.attribute_name(name)
    self.expression(node.value)
    self.emit(ops.load_attr, name)

  # --- calls

  def on_Call(self, node):
    function = node.func
    if isinstance(function, ast.Name) and function.id == 'super':
      self.call_super(node)
      return
    self.expression(function)
    names = [k.arg for k in node.keywords]
    for name in filter(None, names):
      self.checked(name)
    starred = any(isinstance(a, ast.Starred) for a in node.args)
    if not starred and None not in names:
      for value in (*node.args, *(k.value for k in node.keywords)):
        self.expression(value)
      self.emit(control.call, (len(node.args), tuple(names)))
      return
    self.items(node.args, ops.build_list)
    self.emit(ops.build_dict)
    for keyword in node.keywords:
      if keyword.arg is not None:
        self.emit(ops.const, keyword.arg)
      self.expression(keyword.value)
      operation = ops.merge_keywords if keyword.arg is None else ops.add_keyword
      self.emit(operation, 1)
    self.emit(control.call_spread)

  def call_super(self, node) -> None:
    if node.args or node.keywords:
      raise LanguageError(f'line {self.line}: super takes no arguments here')
    unit_scope, hops = self.scope, 0
    while unit_scope is not self.base:
      unit_scope, hops = unit_scope.parent, hops + 1
    self.emit(control.load_super, hops)

  # --- functions

  def on_Lambda(self, node):
    self.function('<lambda>', node.args, [node.body])

  def function(self, name: str, args: ast.arguments, body: list) -> None:
    """A function's defaults, then the function."""
    for default in args.defaults:
      self.expression(default)
    names = [a.arg for a in args.kwonlyargs]
    with_default = [n for n, d in zip(names, args.kw_defaults) if d is not None]
    for default in filter(None, args.kw_defaults):
      self.expression(default)
    positional = [*args.posonlyargs, *args.args]
    extra = [a for a in (args.vararg, args.kwarg) if a is not None]
    everything = [a.arg for a in (*positional, *args.kwonlyargs, *extra)]
    if len(set(everything)) < len(everything):
      raise SyntaxError(f'duplicate argument in {name}')
    for parameter in everything:
      self.checked(parameter)
    scope = make_scope('function', self.scope, body, everything)
    unit = self.child(scope, name)
    code = unit.code
    code.positional = tuple(scope.mangle(a.arg) for a in positional)
    code.positional_only = len(args.posonlyargs)
    code.keyword_only = tuple(map(scope.mangle, names))
    code.by_name = frozenset(
      code.positional[code.positional_only :] + code.keyword_only
    )
    code.varargs = args.vararg and scope.mangle(args.vararg.arg)
    code.kwargs = args.kwarg and scope.mangle(args.kwarg.arg)
    code.is_generator = scope.has_yield
    if isinstance(body[0], ast.stmt):
      unit.finish(body)
    else:
      unit.expression(body[0])
      unit.emit(control.leave)
      unit.finish([])
    self.emit(control.make_function, (code, len(args.defaults), with_default))

  def on_Yield(self, node):
    self.check_yield()
    if node.value is None:
      self.emit(ops.const, None)
    else:
      self.expression(node.value)
    self.emit(control.give)

  def on_YieldFrom(self, node):
    self.check_yield()
    again, end = Label(), Label()
    self.expression(node.value)
    self.emit(control.get_iter)
    self.emit(ops.dup)
    self.mark(again)
    self.next_item(end)
    self.emit(control.give)
    self.emit(ops.pop)
    self.emit(control.jump, again)
    self.mark(end)
    self.emit(control.result_of)

  def check_yield(self) -> None:
    if self.scope is not self.base or self.base.kind != 'function':
      raise SyntaxError(f'yield outside function, line {self.line}')

  def next_item(self, end: Label) -> None:
    """The next item of the iterator on the stack; at its end it is popped."""
    self.emit(control.next_item, end)
    self.emit(control.check_stop, end)

  # --- comprehensions

  def on_ListComp(self, node):
    self.emit(ops.build_list, 0)
    self.comprehension(node, [node.elt], ops.append_item)

  def on_SetComp(self, node):
    self.emit(ops.build_set, 0)
    self.comprehension(node, [node.elt], ops.add_item)

  def on_DictComp(self, node):
    self.emit(ops.build_dict)
    self.comprehension(node, [node.key, node.value], ops.add_pair)

  def comprehension(self, node, values: list, operation) -> None:
    self.expression(node.generators[0].iter)
    self.emit(control.get_iter)
    outer = self.scope
    self.scope = comprehension_scope(node, outer)
    self.emit(control.push_env)
    self.loops(node.generators, 0, values, operation)
    self.scope = outer
    self.emit(control.pop_env)

  def loops(self, generators: list, i: int, values: list, operation) -> None:
    """Loop i of a comprehension, whose iterator is on the stack."""
    generator = generators[i]
    if generator.is_async:
      raise LanguageError(f'line {self.line}: no async in the subset')
    start, end = Label(), Label()
    self.mark(start)
    self.next_item(end)
    self.store(generator.target)
    for test in generator.ifs:
      self.expression(test)
      self.emit(control.jump_if_false, start)
    if i + 1 < len(generators):
      self.expression(generators[i + 1].iter)
      self.emit(control.get_iter)
      self.loops(generators, i + 1, values, operation)
    else:
      for value in values:
        self.expression(value)
      self.emit(operation, len(generators) + 1)
      if operation is control.give:
        self.emit(ops.pop)
    self.emit(control.jump, start)
    self.mark(end)

  def on_GeneratorExp(self, node):
    scope = comprehension_scope(node, self.scope)
    unit = self.child(scope, '<genexpr>')
    unit.code.positional = ('.0',)
    unit.code.is_generator = True
    unit.emit(ops.load_local, '.0')
    unit.loops(node.generators, 0, [node.elt], control.give)
    unit.finish([])
    self.emit(control.make_function, (unit.code, 0, []))
    self.expression(node.generators[0].iter)
    self.emit(control.get_iter)
    self.emit(control.call, (1, ()))
